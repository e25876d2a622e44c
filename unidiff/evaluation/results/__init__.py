"""What a model made, as it lies in files: pictures, captions and answers, and what they are compared with."""
