"""imager: images of disks, kept in a repository, restored with every hash verified."""

__version__ = "0.1.0"
