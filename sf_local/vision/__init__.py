"""Image files, and images as tiles of pixels in a prompt."""
