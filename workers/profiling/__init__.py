"""What each layer costs, from headers by rule or from a trace."""
