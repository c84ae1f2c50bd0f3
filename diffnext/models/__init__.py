"""Networks: embeddings, transformers, autoencoders and text encoders."""
