"""Images of others in, images of ours out: a file for each format, all of them read and written a block at a time."""
