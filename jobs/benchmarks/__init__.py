"""The measurements of `graft bench`, a module for each part of graft."""
