"""Reports: what was kept, what that saves, and pictures of it."""
