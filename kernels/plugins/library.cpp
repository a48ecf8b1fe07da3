// The plugin library's interface: what TensorRT calls when it loads the library
// (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins), and the two numbers that EdgeSeg
// compares before. exports.map hides everything else.

#include <new>

#include "plugin.h"

#define EDGESEG_PLUGIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kAbiVersion = 1;  // kernels/build.py has the same number

// Never destroyed: the registry may outlive this library's static objects.
nvinfer1::IPluginCreatorInterface* const* shared_creators() {
  using namespace edgeseg::plugins;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      new Creator(kUpsampleArgmax), new Creator(kMaskAssembly), new Creator(kPyramidRoiAlign)};
  return creators;
}

}  // namespace

EDGESEG_PLUGIN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) noexcept {
  try {
    nvinfer1::IPluginCreatorInterface* const* const creators = shared_creators();
    count = 3;
    return creators;
  } catch (...) {
    edgeseg::plugins::log_error("edgeseg", "not enough memory for the plugin creators.");
    count = 0;
    return nullptr;
  }
}

EDGESEG_PLUGIN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  edgeseg::plugins::set_logger_finder(finder);
}

EDGESEG_PLUGIN_EXPORT int32_t edgeseg_plugin_abi_version(void) noexcept { return kAbiVersion; }

// The major release whose headers this was compiled against. The plugin interfaces are the same in
// 10.x and 11.x, but the virtual tables of ILogger and ILoggerFinder are not: a library must not
// run with a TensorRT of another major release.
EDGESEG_PLUGIN_EXPORT int32_t edgeseg_plugin_tensorrt_major(void) noexcept {
  return NV_TENSORRT_MAJOR;
}
