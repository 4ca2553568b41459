/* The public header is C and stands alone. */
#include "kernels/c_api/slalom_attention.h"

typedef int32_t (*sla_function)(slalom_context*, const slalom_sla_args*);
typedef int32_t (*salad_function)(slalom_context*, const slalom_salad_args*);

const sla_function slalom_test_sla[] = {slalom_sla_forward, slalom_sla_backward};
const salad_function slalom_test_salad[] = {slalom_salad_forward, slalom_salad_backward};
