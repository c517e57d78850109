"""The re-fit of the noise plan: measure a snapshot beside the trainer, search, publish what was found."""
