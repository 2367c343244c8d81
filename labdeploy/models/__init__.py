"""Model files: headers in, one shape out."""
