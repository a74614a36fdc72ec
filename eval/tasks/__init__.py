"""Tasks: where images, videos, questions and answers come from."""
