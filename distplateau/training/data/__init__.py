"""The samples: in memory or streamed, in which order, augmented how."""
