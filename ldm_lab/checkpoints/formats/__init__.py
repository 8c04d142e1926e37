"""Released formats, one file each."""
