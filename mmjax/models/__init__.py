"""The models, one file each. They import `layers` and do not import each other."""
