"""To the Hugging Face Hub, and back."""
