"""What everything in sarac speaks of: sites, spectra, adapters, plans, graphs, and how they are checked."""
