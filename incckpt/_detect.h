/* Inner loops of _delta.pyx. */
