"""Architecture stage: the shape of the network: attention, experts, recurrences. One technique per file, none edited to add the next."""
