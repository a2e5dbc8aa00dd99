"""The demo: a small extraction task of our own, learned by a real model on y only, and what that did."""
