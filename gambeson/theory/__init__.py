"""The papers' toy worlds, where everything is known exactly, and the figures drawn from them."""
