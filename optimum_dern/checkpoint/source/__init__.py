"""The checkpoint that is compressed: found, checked, and loaded part by part."""
