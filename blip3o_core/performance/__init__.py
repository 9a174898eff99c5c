"""The same numbers faster or in less memory. A reader who wants to know what is computed may skip all of it."""
