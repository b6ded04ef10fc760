"""What people bring: images, volumes, regions, words."""
