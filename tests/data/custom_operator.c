/* A library with one custom operator for ONNX Runtime: test::Triple, three times its input of float32.

The functions of ONNX Runtime are called by their number in its table, which no release changes. */
#include <stddef.h>
#include <stdint.h>

typedef struct { const void *const *(*get_api)(uint32_t); const char *(*version)(void); } ApiBase;
enum {
    CREATE_DOMAIN = 26, ADD_OPERATOR = 27, ADD_DOMAIN = 28, DATA = 51, DIMENSION_COUNT = 61, DIMENSIONS = 62,
    ELEMENT_COUNT = 64, SHAPE = 65, INPUT = 90, OUTPUT = 91, RELEASE_SHAPE = 99
};
typedef void *(*Call)();
#define CALL(number) ((Call)(api[number]))
static const void *const *api;

static void *create(const void *op, const void *table, const void *info) { return (void *)op; }
static const char *name(const void *op) { return "Triple"; }
static const char *provider(const void *op) { return NULL; }
static int type(const void *op, size_t i) { return 1; }
static size_t count(const void *op) { return 1; }
static int required(const void *op, size_t i) { return 0; }
static void destroy(void *kernel) {}

static void compute(void *kernel, void *context) {
    const void *x; void *y, *shape; const float *from; float *to; size_t rank, n, i; int64_t dims[8];
    CALL(INPUT)(context, (size_t)0, &x);
    CALL(SHAPE)(x, &shape);
    CALL(DIMENSION_COUNT)(shape, &rank);
    CALL(DIMENSIONS)(shape, dims, rank);
    CALL(ELEMENT_COUNT)(shape, &n);
    CALL(RELEASE_SHAPE)(shape);
    CALL(OUTPUT)(context, (size_t)0, dims, rank, &y);
    CALL(DATA)(x, &from);
    CALL(DATA)(y, &to);
    for (i = 0; i < n; i++) to[i] = 3 * from[i];
}

static const struct {
    uint32_t version;
    const void *functions[32]; /* later releases have more functions than those of version 8 */
} triple = {8, {create, name, provider, type, count, type, count, compute, destroy, required, required}};

void *RegisterCustomOps(void *options, const ApiBase *base) {
    void *domain, *error;
    api = base->get_api(8);
    if ((error = CALL(CREATE_DOMAIN)("test", &domain))) return error;
    if ((error = CALL(ADD_OPERATOR)(domain, &triple))) return error;
    return CALL(ADD_DOMAIN)(options, domain);
}
