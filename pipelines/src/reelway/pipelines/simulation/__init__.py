"""A small short-video service: viewers, creators, videos, trends, and what viewers do with what they are shown."""
