// TensorRT's side of a plugin, without TensorRT: opens the plugin library as the registry does and
// calls every method of its plugins. Nothing here links libnvinfer, since the interfaces are
// headers only; a recording logger and a small expression builder stand in for what the builder
// passes.
//
// Plain extern "C" functions for ctypes. Handles are pointers; a text stays valid until the next
// call of the same function.

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#define HARNESS extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

class Logger final : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    text += std::to_string(static_cast<int32_t>(severity)) + " " + message + "\n";
  }

  std::string text;
};

class LoggerFinder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }

  Logger logger;
};

// A dimension: a constant, or a name.
class Extent final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  Extent(int64_t value, bool is_constant) : value_(value), is_constant_(is_constant) {
    mImpl = this;
  }

 private:
  bool isConstant() const override { return is_constant_; }
  int64_t getConstantValue() const override { return is_constant_ ? value_ : INT64_MIN; }
  bool isSizeTensor() const override { return false; }

  int64_t value_;
  bool is_constant_;
};

class ExprBuilder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  ExprBuilder() { mImpl = this; }

  const IDimensionExpr* symbol() { return add(0, false); }
  const IDimensionExpr* constant(int64_t value) override { return add(value, true); }

 private:
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* add(int64_t value, bool is_constant) {
    extents_.push_back(std::make_unique<Extent>(value, is_constant));
    return extents_.back().get();
  }

  std::vector<std::unique_ptr<Extent>> extents_;
};

struct Library {
  void* handle;
  LoggerFinder finder;
  IPluginCreatorV3One* const* creators = nullptr;
  int32_t count = 0;
};

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneCore* core(IPluginV3* plugin) {
  return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
}
IPluginV3OneBuild* build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

// As tests/kernels/test_plugins.py has them for ctypes.
struct Tensor {
  int32_t rank;
  int32_t type;
  int32_t format;
  int64_t extents[8];
  int64_t least[8];  // only configure() reads the bounds
  int64_t most[8];
};

namespace {

Dims dims_of(int32_t rank, const int64_t* extents) {
  Dims dims{};
  dims.nbDims = rank;
  memcpy(dims.d, extents, sizeof dims.d);
  return dims;
}

std::vector<PluginTensorDesc> descriptions(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> result;
  for (int32_t i = 0; i < count; ++i) {
    result.push_back({dims_of(tensors[i].rank, tensors[i].extents),
                      static_cast<DataType>(tensors[i].type),
                      static_cast<TensorFormat>(tensors[i].format), 1.0f});
  }
  return result;
}

std::vector<DynamicPluginTensorDesc> dynamic_descriptions(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> result;
  for (const PluginTensorDesc& description : descriptions(tensors, count)) {
    const Tensor& tensor = tensors[result.size()];
    const Dims most = dims_of(tensor.rank, tensor.most);
    result.push_back({description, dims_of(tensor.rank, tensor.least), most, most});
  }
  return result;
}

}  // namespace

// The library at `path`, and what its creators say of themselves; null with a text if not.
HARNESS Library* harness_open(const char* path, int32_t with_logger, const char** error) {
  void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return *error = dlerror(), nullptr;
  const auto set_logger_finder =
      reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
  const auto get_creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
  if (set_logger_finder == nullptr || get_creators == nullptr) return *error = dlerror(), nullptr;
  Library* const library = new Library{handle, {}};
  set_logger_finder(with_logger != 0 ? &library->finder : nullptr);
  // The registry takes each for what its interface says, and so do we.
  IPluginCreatorInterface* const* const creators = get_creators(library->count);
  for (int32_t i = 0; i < library->count; ++i) {
    const InterfaceInfo info = creators[i]->getInterfaceInfo();
    if (strcmp(info.kind, "PLUGIN CREATOR_V3ONE") != 0 || info.major != 1) {
      return *error = info.kind, nullptr;
    }
  }
  library->creators = reinterpret_cast<IPluginCreatorV3One* const*>(creators);
  return library;
}

HARNESS int32_t harness_creators(Library* library) { return library->count; }

// "name version namespace", then the fields: "name:type:length" each on a line.
HARNESS const char* harness_creator(Library* library, int32_t index) {
  static std::string text;
  IPluginCreatorV3One* const creator = library->creators[index];
  text = std::string(creator->getPluginName()) + " " + creator->getPluginVersion() + " " +
         creator->getPluginNamespace();
  const PluginFieldCollection* const fields = creator->getFieldNames();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    text += "\n" + std::string(field.name) + ":" +
            std::to_string(static_cast<int32_t>(field.type)) + ":" + std::to_string(field.length);
  }
  return text.c_str();
}

// What has been logged since the last call: "severity message" on each line.
HARNESS const char* harness_logged(Library* library) {
  static std::string text;
  text.swap(library->finder.logger.text);
  library->finder.logger.text.clear();
  return text.c_str();
}

HARNESS IPluginV3* harness_create(Library* library, int32_t index, const char* layer,
                                  const PluginField* fields, int32_t count, int32_t phase) {
  const PluginFieldCollection collection{count, fields};
  return library->creators[index]->createPlugin(layer, fields == nullptr ? nullptr : &collection,
                                                static_cast<TensorRTPhase>(phase));
}

HARNESS void harness_delete(IPluginV3* plugin) { delete plugin; }

HARNESS IPluginV3* harness_clone(IPluginV3* plugin) { return plugin->clone(); }

HARNESS IPluginV3* harness_attach(IPluginV3* plugin) {
  return runtime(plugin)->attachToContext(nullptr);
}

// A plugin made from what this one serialises, as from a plan: the fields are copied, since a plan
// lies elsewhere, and go to the creator of that name.
HARNESS IPluginV3* harness_through_plan(Library* library, IPluginV3* plugin) {
  const PluginFieldCollection* const fields = runtime(plugin)->getFieldsToSerialize();
  std::vector<std::string> names;
  std::vector<std::vector<char>> contents;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    names.emplace_back(field.name);
    const char* const data = static_cast<const char*>(field.data);
    contents.emplace_back(data, data + 4 * static_cast<size_t>(field.length));
  }
  std::vector<PluginField> copies;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    copies.emplace_back(names[i].c_str(), contents[i].data(), fields->fields[i].type,
                        fields->fields[i].length);
  }
  const PluginFieldCollection collection{fields->nbFields, copies.data()};
  for (int32_t i = 0; i < library->count; ++i) {
    if (strcmp(library->creators[i]->getPluginName(), core(plugin)->getPluginName()) == 0) {
      return library->creators[i]->createPlugin("from the plan", &collection,
                                                TensorRTPhase::kRUNTIME);
    }
  }
  return nullptr;
}

// The fields to serialise: "name:type:value,value" each on a line, of INT32 and FLOAT32.
HARNESS const char* harness_fields(IPluginV3* plugin) {
  static std::string text;
  text.clear();
  const PluginFieldCollection* const fields = runtime(plugin)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    text += (i == 0 ? "" : "\n") + std::string(field.name) + ":" +
            std::to_string(static_cast<int32_t>(field.type)) + ":";
    for (int32_t k = 0; k < field.length; ++k) {
      text += k == 0 ? "" : ",";
      text += field.type == PluginFieldType::kINT32
                  ? std::to_string(static_cast<const int32_t*>(field.data)[k])
                  : std::to_string(static_cast<const float*>(field.data)[k]);
    }
  }
  return text.c_str();
}

// One line each: name version namespace, outputs, workspace, tactics, combinations, timing-cache
// id, metadata, and the kinds of the three capability interfaces and the plugin.
HARNESS const char* harness_describe(IPluginV3* plugin) {
  static std::string text;
  IPluginV3OneBuild* const builder = build(plugin);
  text = std::string(core(plugin)->getPluginName()) + " " + core(plugin)->getPluginVersion() + " " +
         core(plugin)->getPluginNamespace();
  text += "\n" + std::to_string(builder->getNbOutputs());
  text += "\n" + std::to_string(builder->getWorkspaceSize(nullptr, 0, nullptr, 0));
  text += "\n" + std::to_string(builder->getNbTactics());
  text += "\n" + std::to_string(builder->getFormatCombinationLimit());
  text += "\n" + std::string(builder->getTimingCacheID());
  text += "\n" + std::string(builder->getMetadataString());
  text += "\n" + std::string(core(plugin)->getInterfaceInfo().kind);
  text += "\n" + std::string(builder->getInterfaceInfo().kind);
  text += "\n" + std::string(runtime(plugin)->getInterfaceInfo().kind);
  text += "\n" + std::string(plugin->getInterfaceInfo().kind);
  return text.c_str();
}

HARNESS int32_t harness_output_types(IPluginV3* plugin, const int32_t* input_types, int32_t inputs,
                                     int32_t* output_types, int32_t outputs) {
  std::vector<DataType> in(inputs);
  for (int32_t i = 0; i < inputs; ++i) in[i] = static_cast<DataType>(input_types[i]);
  std::vector<DataType> out(outputs, DataType::kINT64);
  const int32_t status = build(plugin)->getOutputDataTypes(out.data(), outputs, in.data(), inputs);
  for (int32_t i = 0; i < outputs; ++i) output_types[i] = static_cast<int32_t>(out[i]);
  return status;
}

// Extents of -1 are symbols. What comes back is an extent, or -1 - (8 * input + axis) for the
// symbol of that place.
HARNESS int32_t harness_output_shapes(IPluginV3* plugin, const Tensor* tensors, int32_t inputs,
                                      Tensor* results, int32_t outputs) {
  ExprBuilder expressions;
  std::vector<DimsExprs> in(inputs);
  for (int32_t i = 0; i < inputs; ++i) {
    in[i].nbDims = tensors[i].rank;
    for (int32_t axis = 0; axis < tensors[i].rank; ++axis) {
      const int64_t extent = tensors[i].extents[axis];
      in[i].d[axis] = extent == -1 ? expressions.symbol() : expressions.constant(extent);
    }
  }
  std::vector<DimsExprs> out(outputs);
  const int32_t status = build(plugin)->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(),
                                                        outputs, expressions);
  if (status != 0) return status;
  for (int32_t o = 0; o < outputs; ++o) {
    results[o].rank = out[o].nbDims;
    for (int32_t axis = 0; axis < out[o].nbDims; ++axis) {
      const IDimensionExpr* const extent = out[o].d[axis];
      results[o].extents[axis] = extent->isConstant() ? extent->getConstantValue() : INT64_MIN;
      for (int32_t i = 0; i < inputs && !extent->isConstant(); ++i) {
        for (int32_t from = 0; from < in[i].nbDims; ++from) {
          if (in[i].d[from] == extent) results[o].extents[axis] = -1 - (8 * i + from);
        }
      }
    }
  }
  return status;
}

HARNESS int32_t harness_supports(IPluginV3* plugin, int32_t position, const Tensor* tensors,
                                 int32_t inputs, int32_t outputs) {
  const auto described = dynamic_descriptions(tensors, inputs + outputs);
  return build(plugin)->supportsFormatCombination(position, described.data(), inputs, outputs);
}

HARNESS int32_t harness_configure(IPluginV3* plugin, const Tensor* inputs, int32_t input_count,
                                  const Tensor* outputs, int32_t output_count) {
  const auto in = dynamic_descriptions(inputs, input_count);
  const auto out = dynamic_descriptions(outputs, output_count);
  return build(plugin)->configurePlugin(in.data(), input_count, out.data(), output_count);
}

HARNESS int32_t harness_shape_change(IPluginV3* plugin, const Tensor* inputs, int32_t input_count,
                                     const Tensor* outputs, int32_t output_count) {
  const auto in = descriptions(inputs, input_count);
  const auto out = descriptions(outputs, output_count);
  return runtime(plugin)->onShapeChange(in.data(), input_count, out.data(), output_count);
}

HARNESS int32_t harness_enqueue(IPluginV3* plugin, const Tensor* inputs, int32_t input_count,
                                const Tensor* outputs, int32_t output_count,
                                const void* const* input_memory, void* const* output_memory,
                                void* stream) {
  const auto in = descriptions(inputs, input_count);
  const auto out = descriptions(outputs, output_count);
  return runtime(plugin)->enqueue(in.data(), out.data(), input_memory, output_memory, nullptr,
                                  static_cast<cudaStream_t>(stream));
}
