"""Checks of a released checkpoint against what its authors published."""
