"""The videos of a folder of outputs, for the page's gallery."""
