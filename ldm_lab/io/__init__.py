"""Files, addresses and images: what every other room stands on."""
