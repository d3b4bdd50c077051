"""The finish on CUDA: the laws of :mod:`loaders.finish.reference` as Triton kernels. Not yet run on a GPU: held to the
reference under Triton's interpreter, and compiled for sm_80 and sm_90.

A chain of ops is cut into passes over the pixels, one launch each. A pass samples its input (as it stands, mirrored,
turned, or as one axis of a blur), sends each pixel through the ops that need no other pixel, and stores floats for the
next pass or, from the last one, the normalised channels-last output. Ops that need to know the
whole image first (contrast its means, equalize its histogram) get it from a launch before their pass, which repeats
the pass up to them and stores nothing but that; reading bytes twice is cheaper than writing and reading floats. So a
chain without blur or contrast is one pass, contrast adds one, a blur adds two, and PAWS's chain takes four.

A blur, of either kind, is one banded matrix along x and then along y: for every image and position the weights of its
neighbours, with what happens at the edge folded in. A kernel writes them first; they are small beside the image.

An image of one channel goes through as three equal ones, of which one is stored.
"""
