"""What a program costs on devices that need not be here: memory, operations, traffic, time."""
