"""Reading and writing checkpoint folders in the published layout."""
