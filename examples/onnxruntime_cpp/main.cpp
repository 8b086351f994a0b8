// Scores two 64 x 64 patches, binary PGM files of 8 bits, by pair_score.onnx.
//   score_pair onnx/pair_score.onnx vis.pgm ir.pgm

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kSize = 64;

// Grey values in [0, 1], row by row.
std::vector<float> ReadPatch(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, maximum = 0;
  file >> magic >> width >> height >> maximum;
  file.get();  // the one white space before the pixels
  if (!file || magic != "P5" || width != kSize || height != kSize || maximum != 255) {
    throw std::runtime_error(path + " is not a binary PGM file of 64 x 64 pixels and 8 bits");
  }
  std::vector<unsigned char> bytes(kSize * kSize);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(path + " ends too early");
  std::vector<float> pixels(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) pixels[i] = static_cast<float>(bytes[i]) / 255.0f;
  return pixels;
}

float Score(const std::filesystem::path& model, std::vector<float>& vis, std::vector<float>& ir) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "kglmatch");
  Ort::Session session(env, model.c_str(), Ort::SessionOptions());
  const std::array<int64_t, 4> shape{1, 1, kSize, kSize};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::array<Ort::Value, 2> inputs{
      Ort::Value::CreateTensor<float>(memory, vis.data(), vis.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor<float>(memory, ir.data(), ir.size(), shape.data(), shape.size())};
  const std::array<const char*, 2> input_names{"patches_vis", "patches_ir"};
  const std::array<const char*, 1> output_names{"score"};
  auto outputs = session.Run(Ort::RunOptions{nullptr}, input_names.data(), inputs.data(), inputs.size(),
                             output_names.data(), output_names.size());
  return *outputs.front().GetTensorData<float>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: score_pair pair_score.onnx vis.pgm ir.pgm\n");
    return 2;
  }
  try {
    auto vis = ReadPatch(argv[2]);
    auto ir = ReadPatch(argv[3]);
    std::printf("%.6f\n", Score(argv[1], vis, ir));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "score_pair: %s\n", error.what());
    return 1;
  }
  return 0;
}
