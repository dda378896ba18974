"""One file a stage: from artifacts in the run folder to artifacts in the run folder."""
