"""Frames of videos: which are read (`sampling`), and the process that reads them out of a file (`worker`)."""
