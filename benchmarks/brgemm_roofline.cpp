// How fast one thread multiplies tiles with torch's own brgemm while all of them stay in cache.
#include <chrono>

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

namespace {

// a [M, K] times b, [K, N] in VNNI order, `calls` times into c [M, N]. Returns seconds.
template <typename A, typename B, typename C>
double repeat(const at::Tensor& a, const at::Tensor& b, at::Tensor& c, int64_t calls) {
    const int64_t m = a.size(0), k = a.size(1), n = c.size(1);
    const auto multiply = [&] {
        at::native::cpublas::brgemm(
            m, n, k, k, n, n, /*add_C=*/false, a.const_data_ptr<A>(), b.const_data_ptr<B>(), c.mutable_data_ptr<C>());
    };
    multiply();  // generates the code
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) multiply();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    at::native::cpublas::brgemm_release();
    return elapsed.count();
}

double int8(const at::Tensor& a, const at::Tensor& b, at::Tensor c, int64_t calls) {
    return repeat<uint8_t, int8_t, int32_t>(a, b, c, calls);
}

double bf16(const at::Tensor& a, const at::Tensor& b, at::Tensor c, int64_t calls) {
    return repeat<at::BFloat16, at::BFloat16, float>(a, b, c, calls);
}

}  // namespace

TORCH_LIBRARY(sparge_roofline, library) {
    library.def("int8(Tensor a, Tensor b, Tensor(c!) c, int calls) -> float", int8);
    library.def("bf16(Tensor a, Tensor b, Tensor(c!) c, int calls) -> float", bf16);
}
