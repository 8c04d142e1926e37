"""Tests of pages in a real browser; a package, so that its modules may be called as those beside it."""
