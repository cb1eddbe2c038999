"""Language and reward models: loaded from a path or taken as given, and refused where their class is not tested."""
