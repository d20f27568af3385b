"""The panels of 03, 04 and 05."""
