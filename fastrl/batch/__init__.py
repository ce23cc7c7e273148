"""What flows between the stages: columns of packed tokens with their axes, packing, shared prefixes."""
