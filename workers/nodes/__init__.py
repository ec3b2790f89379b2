"""Which machines there are: probed, announced, let in."""
