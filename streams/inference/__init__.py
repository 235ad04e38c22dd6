"""The inference worker: serves decisions over HTTP and follows the weights; see `streams.inference.app`."""
