"""The inference worker: decides over HTTP, follows the weights. Its process is `streams.inference.app`."""
