"""`fairshard up`: the whole service on this machine; and the demo."""
