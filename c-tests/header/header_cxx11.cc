// SPDX-License-Identifier: MIT OR Apache-2.0
#include "header_c99.c"
