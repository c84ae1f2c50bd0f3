"""A world of coloured shapes: scenes and clips, their captions, pictures, and a detector."""
