"""From files and samples to batches; everything here runs on the host, in numpy."""
