"""Where images come from: `.beton` files, image folders and small arrays, all behind one reader interface."""
