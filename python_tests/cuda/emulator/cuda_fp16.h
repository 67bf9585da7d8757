#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
