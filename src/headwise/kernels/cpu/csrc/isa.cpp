// Compiled once per set of vector instructions, with HEADWISE_ISA naming it.
#include "attention.h"
#include "decode.h"

#define HEADWISE_JOIN2(a, b) a##b
#define HEADWISE_JOIN(a, b) HEADWISE_JOIN2(a, b)
#define HEADWISE_TEXT2(a) #a
#define HEADWISE_TEXT(a) HEADWISE_TEXT2(a)

namespace headwise {
extern const Kernels HEADWISE_JOIN(kernels_, HEADWISE_ISA);
const Kernels HEADWISE_JOIN(kernels_, HEADWISE_ISA) = {
    HEADWISE_TEXT(HEADWISE_ISA), HEADWISE_ISA::decode, HEADWISE_ISA::attention};
}  // namespace headwise
