"""Architecture stage: the shape of the network: attention, experts, recurrences.

One technique per file; none is edited to add the next.
"""
