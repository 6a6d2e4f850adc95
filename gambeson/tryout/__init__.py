"""The page of `gambeson try`: one classifier, one image, an attack and a certificate, live, on this machine alone."""
