// Runs calls of the native kernel that a file describes, without Python: under a sanitizer, on an emulated CPU.
//
//     native_driver CALLS RESULTS
//
// CALLS holds, call after call: `Call` as it lies in memory; then q, k, v, out, mask and the thresholds, each as an
// int64 number of bytes and the bytes, from its first element to its last. RESULTS: out, density, pv_skipped and kept.
// Each lies in memory of its own, of exactly its size and aligned no further than its elements need.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.cpp"

namespace {

[[noreturn]] void fail(const char* reason) {
    std::fprintf(stderr, "native_driver: %s\n", reason);
    std::exit(1);
}

class Memory {
public:
    Memory(size_t bytes, size_t alignment)
        : bytes_(bytes), skipped_(alignment < 16 ? alignment : 0), data_(new char[skipped_ + bytes]) {
        std::memset(data_.get(), 0xff, skipped_ + bytes);  // NaN
    }
    void* get() const { return bytes_ ? data_.get() + skipped_ : nullptr; }
    template <class T>
    T* as() const { return static_cast<T*>(get()); }
    void read(std::FILE* file) {
        if (bytes_ && std::fread(get(), bytes_, 1, file) != 1) fail("the file of calls ends early");
    }
    void write(std::FILE* file) const {
        if (bytes_ && std::fwrite(get(), bytes_, 1, file) != 1) fail("the results cannot be written");
    }

private:
    size_t bytes_, skipped_;
    std::unique_ptr<char[]> data_;
};

Memory read_memory(std::FILE* file, size_t alignment) {
    int64_t bytes;
    if (std::fread(&bytes, sizeof bytes, 1, file) != 1) fail("the file of calls ends early");
    Memory memory(bytes, alignment);
    memory.read(file);
    return memory;
}

size_t bytes_of(int32_t dtype) { return dtype == sparge::FLOAT32 ? 4 : dtype == sparge::BOOL ? 1 : 2; }

// What a call is quantized to is written, and not looked at.
int quantize(const sparge::Call& call, int64_t b, int64_t head) {
    const int tiles = sparge::ceil_div(call.q_len, sparge::Q_TILE);
    const int k_tiles = sparge::ceil_div(call.k_len, sparge::K_TILE);
    Memory k_codes(call.k_len * call.dim, 1), k_scales(k_tiles * 4, 4), k_exact(k_tiles, 1);
    Memory k_similarity(k_tiles * 4, 4);
    Memory q_codes(sparge::Q_TILE * call.dim, 1), q_scales(sparge::Q_TILE * 4, 4), q_exact(sparge::Q_TILE, 1);
    float q_similarity;
    return sparge_quantized(
        &call, b, head / (call.q_heads / call.kv_heads), head, tiles - 1, k_codes.as<int8_t>(), k_scales.as<float>(),
        k_exact.as<uint8_t>(), k_similarity.as<float>(), q_codes.as<int8_t>(), q_scales.as<float>(),
        q_exact.as<uint8_t>(), &q_similarity);
}

// And what it is clustered to.
int cluster(const sparge::Call& call, int64_t b, int64_t head) {
    const int tiles = sparge::ceil_div(call.q_len, sparge::Q_TILE);
    const int k_tiles = sparge::ceil_div(call.k_len, sparge::K_TILE);
    Memory means(k_tiles * sparge::CLUSTERS * call.dim * 4, 4), sizes(k_tiles * sparge::CLUSTERS * 4, 4);
    Memory spreads(k_tiles * sparge::CLUSTERS * 4, 4), weights(k_tiles * 4, 4);
    return sparge_clustered(
        &call, b, head / (call.q_heads / call.kv_heads), head, tiles - 1, means.as<float>(), sizes.as<float>(),
        spreads.as<float>(), weights.as<float>());
}

void run(sparge::Call call, std::FILE* calls, std::FILE* results) {
    const size_t size = bytes_of(call.dtype);
    Memory q = read_memory(calls, size), k = read_memory(calls, size), v = read_memory(calls, size);
    Memory out = read_memory(calls, size), mask = read_memory(calls, bytes_of(call.mask_dtype));
    Memory thresholds = read_memory(calls, alignof(sparge::Thresholds));
    const int64_t heads = call.batch * call.q_heads;
    Memory density(heads * 4, 4), pv_skipped(heads * 4, 4);
    Memory kept(heads * sparge::ceil_div(call.q_len, sparge::Q_TILE) * sparge::ceil_div(call.k_len, sparge::K_TILE), 1);
    call.q.data = q.get(), call.k.data = k.get(), call.v.data = v.get();
    call.out.data = out.get(), call.mask.data = mask.get();
    call.thresholds = thresholds.as<sparge::Thresholds>();
    call.density = density.as<float>(), call.pv_skipped = pv_skipped.as<float>(), call.kept = kept.as<uint8_t>();
    const int64_t last_batch = call.batch - 1, last_head = call.q_heads - 1;
    if (sparge_attention(&call) || (call.int8 && quantize(call, last_batch, last_head))) fail("no memory");
    if (call.predictor == sparge::CLUSTERED && cluster(call, last_batch, last_head)) fail("no memory");
    for (const Memory* result : {&out, &density, &pv_skipped, &kept}) result->write(results);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) fail("usage: native_driver CALLS RESULTS");
    std::FILE *calls = std::fopen(arguments[1], "rb"), *results = std::fopen(arguments[2], "wb");
    if (!calls || !results) fail("a file cannot be opened");
    sparge::Call call;
    while (std::fread(&call, sizeof call, 1, calls) == 1) run(call, calls, results);
    return std::fclose(results) || std::ferror(calls) ? 1 : 0;
}
